"""A layer's routing on its way from the pretended device to the predictor: nobody waits for it."""

import numpy as np
import torch
from cuda_device import pretend_cuda

from sglmoe.predictor.messages import LayerRouted
from sglmoe.worker.routed import Routed


def test_what_a_layer_was_routed_to_comes_without_a_wait() -> None:
    with pretend_cuda() as device:
        ids = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32).to("cuda", non_blocking=True)
        logits = torch.randn(2, 4, device="cuda").bfloat16()
        hidden = torch.randn(2, 8, device="cuda").bfloat16()
        routing = Routed(5, ids, logits, hidden)
        coming = routing.to_host(b"frames", with_logits=True, with_gate_input=True)
        assert coming.is_there()
        event = coming.event()
        assert device.waits == []
        assert isinstance(event, LayerRouted)
        assert (event.layer, event.num_tokens, event.frames) == (5, 2, b"frames")
        assert np.frombuffer(event.expert_ids, np.int32).tolist() == [3, 1, 2, 0]
        for told, its in ((event.logits, logits), (event.gate_input, hidden)):
            assert np.frombuffer(told, np.float32).tolist() == its.float().flatten().tolist()
