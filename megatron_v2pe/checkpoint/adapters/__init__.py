"""LoRA adapters in checkpoints: drawn, loaded, merged, PEFT folders in and out."""
