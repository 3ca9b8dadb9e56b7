"""What an evaluation leaves behind: samples, results, a report; and two runs compared."""
