"""The shipped YAML files, installed so that `--config configs/grpo.yaml` works from any folder."""
