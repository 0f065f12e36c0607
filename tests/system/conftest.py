from launching import ROOT, hvdtrain, run, torchrun  # noqa: F401 - the name under which some tests import them
