"""What scripts/predict_images.py is made of."""
