"""A package, so that the tests' helpers are found before a `tests` that some installed package brings."""
