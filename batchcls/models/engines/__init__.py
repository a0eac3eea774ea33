"""Inference engines: eager PyTorch, torch.compile and OpenVINO behind one interface."""
