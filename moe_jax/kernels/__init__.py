"""The best implementation of one operation on each platform, behind one function each."""
