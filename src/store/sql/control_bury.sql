-- Leaves a member out, where no heartbeat came since it was looked at. Answers whether it was so.
-- $1 member  $2 the heartbeat that was seen  $3 whether its process has died
update shardmq_control.member
   set gone_at = clock_timestamp(), died = $3
 where member = $1 and heartbeat_at = $2 and left_at is null and (gone_at is null or not died)
returning true
