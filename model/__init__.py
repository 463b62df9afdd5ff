"""The model on arrays alone: items, learner, user profile, ranker, encoder. Imports no other room."""
