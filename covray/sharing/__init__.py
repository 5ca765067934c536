"""What is made with covray, for other people: datasets in other formats, cards, and uploads to the Hugging Face hub."""
