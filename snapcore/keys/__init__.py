"""Keys: who holds one, how a domain's keys come from its root, and sealing (docs/FORMAT.md, "Keys", "Sealing")."""

from snapcore.keys.aws_kms import AwsKms
from snapcore.keys.interface import Holder, Parameters
from snapcore.keys.key_file import KeyFile
from snapcore.keys.passphrase import Passphrase

__all__ = ["AwsKms", "Holder", "KeyFile", "Parameters", "Passphrase"]
