"""Generation: text decoding and image sampling. Both call the training forward, with a `Batch` as in training."""
