"""Every error that the library raises on purpose.

The tree, and what each branch means to the person at the keyboard::

    DendsamError
    ├── InvalidArgumentError      the call itself is wrong: fix the argument
    ├── MissingCapabilityError    this machine lacks what was asked for: install or choose otherwise
    ├── InputFileError            a file cannot be used: fix or replace the file
    │   ├── VolumeError           ... an image or label volume
    │   ├── CheckpointError       ... weights
    │   └── BundleError           ... an exported bundle
    ├── ParityError               a graph does not equal the weights it came from
    ├── StorageError              writing failed: free space or choose another place
    ├── IncompleteRunError        interrupted or partly done: run again to resume
    └── UnsafeFileError           the file could run code: refused

A message says what was found, what was expected and what to do, in one line. Only ``cli.main`` turns these
classes into text and exit codes; exceptions of other libraries are translated where those libraries live.
"""


class DendsamError(Exception):
    """Base class of every error that this package raises on purpose."""


class InvalidArgumentError(DendsamError):
    """An argument has a value that no file or machine could make right."""


class MissingCapabilityError(DendsamError):
    """The machine lacks an engine, device, precision or package that was asked for."""


class InputFileError(DendsamError):
    """An input file cannot be used as what it was given for."""


class VolumeError(InputFileError):
    """An image or label volume is missing, damaged or of an unsupported kind."""


class CheckpointError(InputFileError):
    """A weights file is missing, damaged, or holds another kind of model."""


class BundleError(InputFileError):
    """A bundle is missing, incomplete, altered, or of an unknown version."""


class ParityError(DendsamError):
    """A deployed graph differs from its weights by more than the limits allow."""


class StorageError(DendsamError):
    """The file system refused a write."""


class IncompleteRunError(DendsamError):
    """A run stopped before its end; what is finished is kept and running again resumes it."""


class UnsafeFileError(DendsamError):
    """Opening a file would run code that it brings along."""
