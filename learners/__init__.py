"""How a model changes without forgetting: strategies, training, evaluation, artifacts."""
