"""Training: options (`arguments`, `data_arguments`), data (`image_data`, `text_data`, …), the `trainer`,
checkpoints and output folders, and what a `run` leaves: model, metrics, card.
"""
