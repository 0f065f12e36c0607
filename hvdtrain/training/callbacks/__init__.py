"""Ready callbacks, each an example of how to write one (`hvdtrain.training.events.Callback`)."""
