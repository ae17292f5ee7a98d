"""What was said, and what to rehearse: records, the durable ledger, the replay buffer."""
