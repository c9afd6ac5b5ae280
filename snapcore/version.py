"""The version of the software; the formats have their own (docs/FORMAT.md)."""

VERSION = "0.1.0"
