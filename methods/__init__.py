import support.threads  # noqa: F401  before torch is loaded, by any script of this folder
