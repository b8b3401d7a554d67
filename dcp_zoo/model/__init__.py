"""The DCP model: its components, its plain reference, its fused form, and its checkpoints."""
