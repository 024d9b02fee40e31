-- How long this node keeps a topic's days.
-- $1 topic  $2 days  $3 whether to drop what a group has not read
update shardmq.partition set retention_days = $2, drop_unread = $3 where topic = $1
