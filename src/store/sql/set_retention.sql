-- How long this node keeps a topic's days and dead letters.
-- $1 topic  $2 days  $3 whether to drop what a group has not read  $4 days of dead letters
update shardmq.partition
   set retention_days = $2, drop_unread = $3, dead_letter_days = $4
 where topic = $1
