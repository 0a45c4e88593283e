"""What a call is, and when it is legal: opened to change the contract."""
