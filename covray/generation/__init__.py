"""Images in, frames and answers out."""
