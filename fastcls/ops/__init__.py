"""The ops behind ``fastcls.functional``: for each the function, its fake and its backward."""
