"""What the scripts share: data, metrics, export."""
