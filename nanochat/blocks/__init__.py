"""The layers a model is stacked from: attention, Mamba-2 and their relatives. Nothing is imported here on purpose."""
