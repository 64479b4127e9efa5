"""Commands around the experiments; nothing imports them but each other and the tests."""
