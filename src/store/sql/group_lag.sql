-- A group's cursors and lag in a topic's partitions on this node: the columns of "lag", though the member
-- is there whose lease is long over, then the cursor's epochs and whether the lease is live.
-- $1 topic  $2 group
select l.group_name, l.partition, l.acked_id, l.last_id, l.lag, l.oldest_at, c.member, l.leased_until,
       c.epoch, c.reset_epoch, coalesce(l.leased_until > shardmq.clock(), false)
  from shardmq.lag($1) l join shardmq.cursor c using (group_name, partition)
 where l.group_name = $2
