"""What data, parallel, models and train pass on: packs and a rank's share of them."""
