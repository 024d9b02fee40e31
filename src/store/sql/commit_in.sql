-- Acknowledges one message inside a user's transaction, which holds the cursor's row until it ends.
-- Nothing where the fence does not hold, the message is acknowledged already, or another server answers
-- than the one that it was read from.
-- $1 group  $2 partition  $3 owner  $4 epoch  $5 reset epoch  $6 incarnation  $7 id
-- $8 whether all before it is acknowledged
update shardmq.cursor c
   set acked_id = case when $8 then $7 else c.acked_id end,
       acked_ahead = case when $8 then c.acked_ahead - int8multirange(int8range(null, $7, '[]'))
                          else c.acked_ahead + int8multirange(int8range($7, $7, '[]')) end
 where c.group_name = $1 and c.partition = $2
   and (c.owner, c.epoch, c.reset_epoch) = ($3, $4, $5)
   and pg_postmaster_start_time() = $6
   and c.acked_id < $7 and not c.acked_ahead @> $7
