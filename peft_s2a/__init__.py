"""S2A: fine-tuning vision backbones with little memory, as a PEFT plugin. Importing registers the tuner types with PEFT."""
