"""How good are the answers: episodes, scores, baselines, and what the figures of a set of episodes allow to say."""
