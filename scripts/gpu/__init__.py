"""What `gpu_check.py` measures, and with what."""
