"""The workbook's library: from data to a phone-ready quantized file, with the cost of every step measured.

Importing this package loads nothing heavy; see docs/HOUSE.md for the rooms and their floors.
"""

__version__ = "0.1.0"
