"""What child processes import, for the fork server to import once. None of it may touch a device or start to compute."""

import gc
import importlib

from sglang.srt.plugins import load_plugins

MODULES = (
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglmoe.scheduler.process",
    "sglmoe.scheduler.frontend",
    "sglmoe.scheduler.frontend_setup",
    "sglmoe.worker.process",
)

load_plugins()
for name in MODULES:
    importlib.import_module(name)

# What is imported is there to stay: children share these pages, and their garbage collectors do not walk them.
gc.freeze()
