"""What the stages report, and how it looks as tables, pictures and pages."""
