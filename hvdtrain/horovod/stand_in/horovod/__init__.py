"""What ``import horovod`` finds in processes that a script starts itself, such as loader processes: hvdtrain's modules."""

from hvdtrain.horovod.importing import install

install()  # takes this module's place in sys.modules
