from tests.cli.conftest import runner

__all__ = ["runner"]
