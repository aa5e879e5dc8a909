"""Where the bundled demo model is: a small trained Qwen3-MoE, made by `eval/demo_model`."""

from pathlib import Path

DEMO_MODEL = Path(__file__).with_name("demo_model_files")
