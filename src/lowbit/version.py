"""The version of the package, which the build and the C++ part read too."""

__version__ = "0.1.0"
