"""The S4D aggregator as a step of fixed shape: streamed, exported, and run by several runtimes."""
