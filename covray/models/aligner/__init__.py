"""ThinkDiff's aligner: from features of a vision-language model to the input of a language model's decoder."""
