"""The Hugging Face Hub: catalogue of models, client, access, token, download, a stand-in for tests (notebook 01)."""
