"""Image tokenizers: pictures as codes of a vector-quantised codebook."""
