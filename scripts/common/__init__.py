"""What commands of every kind share: how they end, the machine they run on, files of saved models, pictures, tables, and
figures of a model's offsets.
"""
