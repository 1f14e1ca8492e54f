"""`save` and `load` for models with packed layers. Imports `torch.layers` and `torch.acceleration`."""
