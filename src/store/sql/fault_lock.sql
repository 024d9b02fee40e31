-- Locks the table of a day against everybody, up to the end of the transaction.
-- Filled in: {partition}, {day}. For private servers that are broken on purpose.
lock table shardmq.batch_{partition}_{day} in access exclusive mode
