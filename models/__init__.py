"""What is trained: one module of networks per task, and how a trained model is written down."""
