"""The predictor that serves, a step at a time, gives what the model gives of whole requests."""
import numpy as np
import pytest
import torch

from sglmoe.prediction.predictor import StepTokens
from sglmoe.prediction.routing_path import RoutingPath
from sglmoe.prediction.routing_path_model import Dimensions, RoutingPathModel

TINY = Dimensions(
    num_layers=2, num_experts=4, vocab_size=11, d_model=8, d_ff=16, d_kv=4, num_heads=2,
    num_blocks=2, prompt_tokens=5, window_tokens=3,
)


def tiny(**changes):
    torch.manual_seed(0)
    m = RoutingPathModel(TINY)
    torch.nn.init.normal_(m.embedding.weight)
    return m
def step(*runs):
    ids=[t for _,_,ts in runs for t in ts]; pos=[p+i for _,p,ts in runs for i in range(len(ts))]; own=[o for o,_,ts in runs for _ in ts]
    return StepTokens(np.array(ids,np.int32),np.array(pos,np.int32),np.array(own,np.int32))
def test_x():
    m=tiny(); p=RoutingPath(m)
    prompt=[1,2,3,4]; gen=[5,6,7,8,9,10,1]
    with torch.inference_mode():
        st=m.encode(torch.tensor([prompt]),torch.tensor([4])); pr=torch.sigmoid(m.head(m.decode(torch.tensor([gen]),st,torch.tensor([4]))))[0].numpy()
        pp=torch.sigmoid(m.head(st))[0].numpy()
    p.begin_step(step((7,0,prompt)))
    np.testing.assert_allclose(p.scores().ravel(),1-np.prod(1-pp,0),atol=1e-6)
    for i,t in enumerate(gen):
        p.begin_step(step((7,4+i,[t])))
        np.testing.assert_allclose(p.scores().ravel(),pr[i],atol=1e-6)
