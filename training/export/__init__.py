"""Folders that leave a run: Hub folders, ONNX, PEFT adapters, model cards."""
