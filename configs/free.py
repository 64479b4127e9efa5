"""The keys of a configuration that no number depends on; for whoever compares two, with Hydra at hand or without."""

FREE = frozenset(
    {
        "expected",
        "loader_timeout",
        "num_workers",
        "device",
        "verify",
        "resume",
        "validation",
        "save_dir",
        "run_dir",
        "dataset.root",
        "dataset.source.root",
        "trainer.tensorboard",
        "trainer.panels",
        "trainer.save_minutes",
        "trainer.save_every",
        "trainer.keep",
    }
)
