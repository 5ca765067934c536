"""Claims about arms: what ways to train and to decode say beside each other, and the files of a programme of claims."""
