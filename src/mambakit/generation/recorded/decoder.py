"""x"""
RecordedDecoder=None
